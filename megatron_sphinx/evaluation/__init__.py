"""How good a model is: benchmarks of the papers, metrics, reports beside the papers' numbers, a look at experts."""
