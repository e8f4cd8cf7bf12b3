from lazydp.api.steps import evaluate as evaluate
from lazydp.api.steps import export as export
from lazydp.api.steps import ingest as ingest
from lazydp.api.steps import train as train
from lazydp.components.budget.accounting.epsilon import calibrate_noise_multiplier as calibrate_noise_multiplier
from lazydp.components.budget.accounting.epsilon import epsilon as epsilon
from lazydp.components.budget.ledger.ledger import Ledger as Ledger
from lazydp.components.bundle.module_release import load_module_release as load_module_release
from lazydp.components.bundle.reader import Bundle as Bundle
from lazydp.components.export.module import export_module as export_module
from lazydp.components.train.accounted_trainer import AccountedTrainer as AccountedTrainer
from lazydp.components.train.data.sampler import PoissonSampler as PoissonSampler
from lazydp.components.train.engine.dense import DenseOptimizer as DenseOptimizer
from lazydp.components.train.mechanism.parameters import PrivacyParameters as PrivacyParameters
from lazydp.components.train.private import PrivateTrainer as PrivateTrainer
from lazydp.components.train.private import make_private as make_private
from lazydp.components.train.private_with_epsilon import make_private_with_epsilon as make_private_with_epsilon
from lazydp.components.train.replacements import fix as fix
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd as EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey as NoiseKey
from lazydp.service.client import Client as Client

__version__: str
