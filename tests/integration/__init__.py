"""The plugin, the dispatch and real engines."""
