"""What reuse between similar tasks gains in speed and costs in quality: `kvarena bench simllm`, `kvarena simllm demo`.

`running` makes a stream of tasks from questions on chunks and has engines over the same weights answer it in turn,
`measuring` makes figures of the answers, `demo` shows single requests.
"""
