"""The playable engine: a world model at the table, in the browser, in a window, on film."""
