"""Models: loading them, refusing what would be computed wrongly, and saying what their parts are."""
