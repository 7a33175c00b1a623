#!/bin/sh
# Takes out of the virtual environment $1 what a container never uses: symbol tables, headers, tests, installers.
set -eu
site=$(echo "$1"/lib/python3*/site-packages)
"$1/bin/pip" uninstall --quiet --yes pip setuptools
# Not those in NAME.libs: they were repacked, and do not survive it; nor NVIDIA's, which come stripped.
find "$site" -name "*.so*" -type f -not -path "*.libs/*" -not -path "*/nvidia/*" -exec strip --strip-unneeded {} + 2>/dev/null || true
rm -rf "$site"/torch/include "$site"/torch/share "$site"/torch/test "$site"/torch/lib/*test*.so
find "$site"/torch/bin -type f -not -name torch_shm_manager -delete
rm -rf "$site"/torch/testing/_internal/opinfo "$site"/torch/testing/_internal/generated \
    "$site"/torch/testing/_internal/common_methods_invocations.py "$site"/torch/testing/_internal/__pycache__
rm -rf "$site"/pyarrow/include "$site"/pyarrow/tests "$site"/pyarrow/src
rm -f "$site"/pyarrow/*.pyx "$site"/pyarrow/*.pxd "$site"/pyarrow/*flight* "$site"/pyarrow/*s3fs*
# TensorBoard reads event files in Python as well: `tensorboard --load_fast=false`.
rm -rf "$site"/tensorboard_data_server/bin
# The pictures of matplotlib's reports are SVG or PNG: other fonts and sample data are not used.
rm -rf "$site"/matplotlib/mpl-data/fonts/afm "$site"/matplotlib/mpl-data/fonts/pdfcorefonts "$site"/matplotlib/mpl-data/sample_data
find "$site" \( -name "*.pyi" -o -name "*.pyx" -o -name "*.c" -o -name "*.h" \) -type f -delete
find "$site" -type d \( -name tests -o -name benchmarks \) -prune -exec rm -rf {} +
# Does what is left still work?
"$1/bin/python" -c "
import torch, torch.optim, torch._dynamo, numpy, sklearn.datasets, scipy.ndimage, pyarrow.csv, pyarrow.parquet, pyarrow.json, PIL.Image
import matplotlib.pyplot, cryptography, grpc, tensorboard.program, flwr.serverapp, flwr.clientapp
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
sklearn.datasets.load_digits()
"
