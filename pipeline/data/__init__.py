"""Data in the order an image travels: shards, stream, decode, augment, batch."""
