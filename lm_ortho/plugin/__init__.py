"""Makes a released lm-eval and transformers find us: the start-up hook and the bridges it calls."""
