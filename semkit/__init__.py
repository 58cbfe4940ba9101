"""semkit: stable unlearnable examples, taught and measured."""

__version__ = "0.1.0"
