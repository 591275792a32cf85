"""Does xfv1 fit the plugin surface of a released vLLM? Asked of its Python sources, on a CPU."""
