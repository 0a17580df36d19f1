"""What acts on weights. A method is one file and one line in `Methods`: the fields are the registry."""

from pydantic import Field

from cfsd.train.methods.ewc import Ewc
from cfsd.train.methods.l2 import L2
from cfsd.train.methods.lora import Lora
from cfsd.train.methods.method import MethodSet


class Methods(MethodSet):
    """Each method's settings, off by default. Penalties add up; a method that is off is in no key."""

    l2: L2 = Field(L2(), description="L2-SP: pull towards the base's weights")
    ewc: Ewc = Field(Ewc(), description="EWC: pull towards them by how much the base's text depends on each")
    lora: Lora = Field(Lora(), description="LoRA: train small matrices beside the base's, merged into them at the end")
