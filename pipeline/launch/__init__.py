"""Starting processes. train never launches; launch never trains."""
