#!/bin/bash
# @{about}
# Run this on every machine (@{nodes} in all); they must see the same files under the same names.
set -euo pipefail
@{alone}exec @{torchrun}
