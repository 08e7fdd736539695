"""How long a test waits for what must come.

It bounds a hang, and says nothing about speed: who waits goes on at once when it comes. So it is long, for a
machine that is asked for twenty times what it can do. What must *not* come, or must take its time, has a figure of
its own.
"""

PATIENCE_S = 90.0
