"""PassKey: recipes, results and figures."""
