"""Several lines that are one message: between three quotes, or joined by a backslash at their ends. Knows texts."""

QUOTES = '"""'


def opens_block(line: str) -> bool:
    """Whether a line that was typed begins a message of several, up to the next three quotes."""
    return line.lstrip().startswith(QUOTES) and not _closes(line)


def continues(text: str, block: bool) -> bool:
    """Whether a message goes on after its last line was ended. block: its first opened one."""
    if block:
        return not _closes(text)
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


def unquoted(text: str, block: bool) -> str:
    """The message without the quotes around it."""
    if block or (text.strip().startswith(QUOTES) and _closes(text) and "\n" not in text):
        return text.strip()[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text


def _closes(text: str) -> bool:
    return text.rstrip().endswith(QUOTES) and len(text.strip()) >= 2 * len(QUOTES)
