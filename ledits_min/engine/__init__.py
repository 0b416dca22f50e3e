"""The loops of `edit`, made fast. Nobody has to read this to learn LEDITS."""
