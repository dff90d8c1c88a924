"""`make gpu`: builds, tests and measures on a machine with a GPU; see __main__.py for the command and steps.py for what
it does.
"""
