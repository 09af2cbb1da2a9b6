"""Models: loading, refusing what would be computed wrongly, saying what their parts are."""
