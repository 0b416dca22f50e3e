"""What a checkpoint is, told from its headers: folders, single files, the hub cache."""
