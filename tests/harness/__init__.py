"""From a case to a line of the report. Data flows one way; each step is a module.

                        .-> truth: the reference's answer, and its budget -.
    case -> its inputs -|                                                  |-> compare -> record
                        '-> driver: what the candidate does ---------------'             -> report

The driver sets up a server's parts (`server`), describes the batch (`batch`) and asks what the
backend refuses (`refusals`). `trial` holds one candidate's way through all of it; `promises` says
which cases a test takes. `tests/meta/test_harness_arrows.py` keeps the imports in this direction.
"""
