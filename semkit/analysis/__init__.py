"""Analysis: measures, runs and grids with their cache, cost, figures."""
