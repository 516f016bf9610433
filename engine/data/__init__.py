"""Data sets and tokenizers by name. A line here names a module; nothing is imported until it is chosen.

A data set is a module with `load(settings) -> {"train": str, "validation": str, "test": str}`; one of documents, with
`load(settings) -> engine.data.documents.Source`; or one of labelled rows, with
`load(settings) -> engine.data.labelled.Source` and the VERSION of its clean-up; or one of dialogues, with
`load(settings) -> engine.data.dialogues.Source` and the VERSION of what it makes of its files.
A tokenizer is a class with the methods of `engine.data.tokenizers.Tokenizer`.
This file must import nothing: `engine.config` reads these names before anything else is loaded.
"""

DATASETS = {
    "stdlib": "engine.data.stdlib",
    "wikitext2": "engine.data.wikitext2",
    "tinyshakespeare": "engine.data.tinyshakespeare",
    "text": "engine.data.textdir",
    "text_file": "engine.data.textfile",
}

BY_POSITION = ("tinyshakespeare", "text_file")  # one text, cut by position into training, validation and test

DOCUMENTS = {  # text of documents, which a hash divides into splits and an end-of-text token divides in them
    "fineweb_edu": "engine.data.fineweb_edu",
    "imdb_text": "engine.data.imdb_text",
}

TEXTS = {**DATASETS, **DOCUMENTS}  # what a language model learns from

LABELLED = {  # rows of a text and a label
    "ag_news": "engine.data.ag_news",
    "imdb": "engine.data.imdb",
    "table": "engine.data.table",
    "synthetic": "engine.data.synthetic",
}

DIALOGUES = {  # what two speakers say in turn, each reply to be chosen among several
    "personachat": "engine.data.personachat",
    "imdb_turns": "engine.data.imdb_turns",
    "dialogues": "engine.data.dialogue_files",
}

BY_NAME = (  # what is fetched by name where data_dir is empty
    "wikitext2",
    "fineweb_edu",
    "imdb_text",
    "ag_news",
    "imdb",
    "personachat",
    "imdb_turns",
)

TOKENIZERS = {
    "bytes": "engine.data.tokenizers:Bytes",
    "chars": "engine.data.tokenizers:Chars",
    "words": "engine.data.tokenizers:Words",
    "bpe": "engine.data.tokenizers:Bpe",
    "gpt2": "engine.data.tokenizers:Gpt2",
    "hashed_words": "engine.data.words:HashedWords",
    "frequent_words": "engine.data.words:FrequentWords",
}

PADDED = (
    "hashed_words",
    "frequent_words",
)  # tokenizers whose id 0 is padding: those of labelled rows, and only theirs

UTTERING = ("bytes", "chars", "bpe", "gpt2")  # tokenizers that add nothing to a single utterance

SEPARATING = ("bpe", "gpt2")  # tokenizers that have an end-of-text token, which documents need
