"""The measuring core: configuration, cells, execution, rows."""
