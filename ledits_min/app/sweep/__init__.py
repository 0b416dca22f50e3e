"""`ledits sweep`: one or two numbers of an edit against each other."""
