"""Everything that decides a run: options, published recipes, the rule for small sets."""
