"""The stack: which services there are, how they start, wait, log and stop.

`settings` are read once, `plan` decides what they leave open, `services` turns the plan into the list of processes,
`preflight` says what is missing, `supervisord` runs the list (`containers` where they are containers) and
`lifecycle` has the commands up, restart and down. Nothing here imports an engine: vLLM, LMCache and the page are other
processes, reached by command line, environment and HTTP.
"""
