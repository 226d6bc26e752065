"""The benchmarks that are known, a record each: files, fields, prompts, length of answers, metric."""
