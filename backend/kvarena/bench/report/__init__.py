"""`kvarena report`: one HTML page from result files of any benchmark. Reads files, measures nothing."""
