"""Chat templates with a fixed date, so that rows that are made tomorrow have the same tokens as today's."""

import re
from datetime import datetime

from transformers import PreTrainedTokenizerBase

TODAY = datetime(2024, 7, 26)
# In the template's text: transformers gives templates no functions of ours, only data.
DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def dated_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template with a fixed date in place of today's. Raises ValueError when there is no template."""
    return DATE.sub(lambda call: repr(TODAY.strftime(call[2])), tokenizer.get_chat_template())
