"""The playable engine: a world model to play with, in the browser, in a window, on film."""
