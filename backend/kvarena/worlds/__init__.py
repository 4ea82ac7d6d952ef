"""Made-up towns: chunks of facts, questions on them, and gold answers that follow from the chunks as they stand.

Pure Python, no tensors. `town` writes the chunks, `reading` reads them as a careful person would, `questions` asks,
`chat` renders prompts, `folder` is the form on disk.
"""
