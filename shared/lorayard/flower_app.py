"""What `celery -A lorayard.flower_app flower` loads: the fleet's Celery application, its address from the settings."""

from lorayard import embedded
from lorayard.celery_app import make_app
from lorayard.settings import Settings

app = make_app(embedded.broker_url(Settings.load()))
