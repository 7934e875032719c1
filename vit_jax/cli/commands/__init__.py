"""One public module for each command, named as users type it; each holds its `COMMAND`.

A module here imports what its command needs only when the command runs, so that `--help` answers
at once and works on machines where JAX and TensorFlow are not installed.
"""
