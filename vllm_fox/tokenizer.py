def register_tokenizer() -> None:
    pass
