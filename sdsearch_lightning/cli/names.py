"""The commands by name, each with the line that both helps show."""

from __future__ import annotations

COMMANDS = {
    "supervise": "cold start: learn written demonstrations; writes runs/<name>/model/",
    "fit": "SD-Search training; starts, resumes or reports the run in runs/<name>/",
    "validate": "evaluate on the validation questions",
    "test": "evaluate on the test questions, per source",
    "predict": "answer the test questions, gold answers or not; writes predictions.jsonl",
    "ask": "answer a question with a trained model, searches and passages shown as they come",
    "demonstrate": "write demonstrations for supervise with a script of yours, on your retriever",
    "plan": "memory per GPU by part, of a fit that has not begun; refuses what cannot fit",
    "index": "build a retrieval index of a corpus",
    "serve": "share a retrieval index over HTTP, as Search-R1's server does",
    "export": "turn a checkpoint into a Hugging Face folder or a LoRA adapter; push it to the hub",
    "browse": "explore the rollouts of a run, and the credit of each query, in the terminal",
    "report": "print the report of a run again, and rebuild report.html; compare several runs",
    "completion": "print what completes commands and keys in bash, zsh or tcsh",
}
