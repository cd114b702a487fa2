"""A world model that follows the game and a policy that acts on it: collect, replay, train, evaluate."""
