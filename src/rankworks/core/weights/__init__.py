"""How base weights are held: dense, as integers, stacked or shared; reading them, folding changes in."""
