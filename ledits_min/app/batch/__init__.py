"""`ledits batch`: a table or a folder of pictures, in shared batches."""
