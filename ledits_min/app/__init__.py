"""What people touch: the `ledits` command. Nothing outside this folder imports it."""
