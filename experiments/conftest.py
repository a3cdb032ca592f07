# SPDX-License-Identifier: MIT
"""For all tests of this folder."""

import torch

torch.set_num_threads(1)  # in models this small threads only wait for each other
