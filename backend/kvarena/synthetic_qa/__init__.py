"""Made-up towns: chunks of facts, questions on them, and gold answers that follow from the chunks as they stand.

Pure Python, no tensors. `town` writes the chunks, `facts` has what can be said and reads chunks as a careful person
would, `questions` asks, renders prompts and writes the files.
"""
