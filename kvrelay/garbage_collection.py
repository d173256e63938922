"""When Python looks for garbage cycles in a process that serves: not while it starts, and later not in what it started with.

A worker begins with hundreds of thousands of objects that live as long as it does. Going through them takes a tenth of a second,
in which no thread of the process runs Python: every stream would wait for it.
"""

import gc


def pause_collection() -> None:
    """Before imports and the model's load, all of which make objects that stay. `keep_what_is_loaded` must follow."""
    gc.disable()


def keep_what_is_loaded() -> None:
    """Once all is loaded: collects what loading left, and from now on looks only at what is made later."""
    gc.collect()
    gc.freeze()
    gc.enable()
