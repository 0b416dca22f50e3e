"""`ledits web`: a local page to edit pictures."""
