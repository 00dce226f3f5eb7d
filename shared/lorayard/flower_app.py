"""What `celery -A lorayard.flower_app flower` loads: the fleet's Celery application, its address from the settings."""

from lorayard import embedded
from lorayard.celery_app import make_app
from lorayard.settings import Settings

app = make_app(embedded.broker_url(Settings.load()))
# Flower asks the workers several things at once, and each question holds one connection while it takes a second: with a limit on them
# they wait for each other for ever, and the thread that reads the events with them, so that no row is ever shown.
app.conf.broker_pool_limit = None
