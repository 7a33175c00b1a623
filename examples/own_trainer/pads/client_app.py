"""The ClientApp: it trains with this app's own functions."""

from pads.task import Net, load_data, test, train
from quickbloom.client import own_trainer

app = own_trainer(Net, load_data, train, test)
