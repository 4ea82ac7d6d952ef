"""`kvarena eval`: how good the answers of contenders are, on questions with gold answers, and how soon they come.

`questions` are put to `setups` through an `Answerer`, over HTTP or in this process; `scoring` and `intervals` make
figures of the answers, `rows` a result file's rows, and `plot` its picture.
"""
