"""What acts on weights or on the target's loss. A method is a file and a line in `Methods`: fields are the registry."""

from pydantic import Field

from cfsd.train.methods.dft import Dft
from cfsd.train.methods.eaft import Eaft
from cfsd.train.methods.ewc import Ewc
from cfsd.train.methods.l2 import L2
from cfsd.train.methods.lora import Lora
from cfsd.train.methods.method import MethodSet
from cfsd.train.methods.osft import Osft
from cfsd.train.methods.stm import Stm
from cfsd.train.methods.target_divergence import HoldTarget


class Methods(MethodSet):
    """Each method's settings, off by default. Penalties add up, weights of tokens multiply."""

    l2: L2 = Field(L2(), description="L2-SP: pull towards the base's weights")
    ewc: Ewc = Field(Ewc(), description="EWC: pull towards them by how much the base's text depends on each")
    lora: Lora = Field(Lora(), description="LoRA: train small matrices beside the base's, merged into them at the end")
    osft: Osft = Field(Osft(), description="OSFT: train only what is orthogonal to each layer's largest directions")
    dft: Dft = Field(Dft(), description="DFT: learn target tokens by how likely the model finds them")
    eaft: Eaft = Field(Eaft(), description="EAFT: learn target tokens by how unsure the model is of what comes there")
    stm: Stm = Field(Stm(), description="STM: learn only the target tokens that do not surprise the base")
    target_divergence: HoldTarget = Field(
        HoldTarget(), description="Stay near the base's distribution along the target's responses; with dft: ASFT"
    )
