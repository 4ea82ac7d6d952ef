"""The stack: which services there are, how they start, wait, log and stop.

`settings` is read once, `services` turns it into the list of processes, `preflight` says what is missing,
`supervision` runs the list under supervisord and `lifecycle` holds the commands up, restart and down. Nothing here
imports an engine: vLLM, LMCache and the page are other processes, reached by command line, environment and HTTP.
"""
