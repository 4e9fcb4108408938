"""Programs of unknown intent, run where they can reach nothing.

::

    run(argv, files, limits) -> bwrap | unshare -> pid 1 of new namespaces (inside.py) -> the program
       ^                                                  |  watches time, memory, files, output
       +-------- output, exit code, files: bytes ---------+  kills what is left, collects

What the program sees: ``/usr`` and the interpreter read-only, ``/work`` and ``/tmp`` of bounded size, a
clean environment, no network, no other process. It is an unprivileged user without capabilities
behind a seccomp filter. The host never opens a file that it wrote: files leave as bytes in a
message, packed after the last of its processes is dead.

:mod:`actor.sandbox.run` is what the rest of the actor calls. The other modules but
:mod:`actor.sandbox.backends` also run inside and import nothing but the standard library.
"""
