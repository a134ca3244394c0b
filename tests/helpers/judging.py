"""What a generative judge should say, by a plain forward pass."""

from data_utils import encode_prompt, encode_text, load_tokenizer, resolve_model
from helpers.loop import ROOT
from judges.base import fill_template, read_template
from judges.generative import split_labels
from training.models import load_model


class PlainJudge:
    """The judge of a folder with the template and the labels of OffsetBias."""

    def __init__(self, folder):
        directory = resolve_model(str(folder))
        self.tokenizer, self.model = load_tokenizer(directory), load_model(directory).eval()
        self.template = read_template(ROOT / "prompts/offsetbias.txt")
        labels = (encode_text(self.tokenizer, label) for label in ("Output (a)", "Output (b)"))
        self.prefix, self.labels = split_labels(*labels)

    def __call__(self, prompt, first, second):
        """(P(first beats second) in this order, probability of both labels together)."""
        import torch

        text = fill_template(self.template, prompt, first, second)
        with torch.no_grad():
            ids = torch.tensor([encode_prompt(self.tokenizer, text) + self.prefix])
            both = self.model(input_ids=ids).logits[0, -1].softmax(0)[list(self.labels)]
        return (both[0] / both.sum()).item(), both.sum().item()
