"""Parts of configs that several config files share."""
