"""What a run is: the typed config, one recipe file per system, logging and checkpoints. Runs lie in `runs/out/`.

Importing it makes "Dream-v0" known to gymnasium; what it takes is imported when a dream is made.
"""

import gymnasium

if "Dream-v0" not in gymnasium.registry:
    gymnasium.register(id="Dream-v0", entry_point="runs.dreams:make_env", vector_entry_point="runs.dreams:make_vector")
