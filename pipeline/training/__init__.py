"""The optimizer step: loss, optimizer, schedule, Lightning module, checkpoints."""
