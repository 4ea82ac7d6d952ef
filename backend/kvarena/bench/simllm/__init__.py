"""`kvarena bench simllm`: what reuse between similar tasks gains in speed and costs in quality.

`stream` makes tasks of questions on chunks, `contenders` are engines over the same weights, `running` has them answer
in turn, `rows` makes figures of the answers. `plot` and `table` show them, `demo` shows single requests.
"""
